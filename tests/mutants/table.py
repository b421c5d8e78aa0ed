"""All mutants. Where code moves, the runner says which entry has to follow; a new check in the
package deserves a new entry.
"""

from .files import OUTPUT, VECTOR
from .mutant import Edit, Mutant
from .numbers import NUMBERS
from .step import STEP


__all__ = ["MUTANTS", "Edit", "Mutant"]
MUTANTS = (*VECTOR, *NUMBERS, *STEP, *OUTPUT)
