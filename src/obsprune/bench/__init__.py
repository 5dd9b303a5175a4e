"""How fast a run is on this machine, beside what the machine could do: phases, ceilings, and how cost grows."""
