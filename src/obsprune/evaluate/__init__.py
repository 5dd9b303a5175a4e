"""How good a model is: walks it like the engine does, changes nothing."""
