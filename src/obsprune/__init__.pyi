"""The types of what `import obsprune` offers (obsprune.PUBLIC)."""

from obsprune.api import Result as Result
from obsprune.api import make_recipe as make_recipe
from obsprune.api import prune as prune
from obsprune.core.lora import merge_lora as merge_lora
from obsprune.core.patterns import NofM as NofM
from obsprune.core.patterns import Pattern as Pattern
from obsprune.core.patterns import PerRow as PerRow
from obsprune.core.patterns import Unstructured as Unstructured
from obsprune.core.statistics import Gram as Gram
from obsprune.errors import InputError as InputError
from obsprune.models.semi_structured import to_semi_structured as to_semi_structured
from obsprune.models.sparse_training import keep_sparse as keep_sparse
from obsprune.models.trainer import SparsityCallback as SparsityCallback
from obsprune.recipe import Recipe as Recipe
from obsprune.solvers.base import Solution as Solution
from obsprune.solvers.base import Solver as Solver
from obsprune.solvers.base import State as State

__version__: str
PUBLIC: dict[str, str]
