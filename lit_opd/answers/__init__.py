"""What an answer says, and whether two say the same: pure functions of text, without torch and without mathematics.

``boxes`` cuts the answer out; ``cleaning`` gives one spelling to one meaning; ``reading`` sees the shape (list, interval, matrix,
equation); ``units`` and ``arithmetic`` read numbers, exactly; ``comparing`` puts them together. The grading worker imports this
package too, so it needs the standard library only.
"""

from lit_opd.answers.boxes import BOX, after_hashes, boxed_answer, last_box
from lit_opd.answers.cleaning import canonical, cleaned
from lit_opd.answers.comparing import NeedsMathematics, exact_value, same, undecided

__all__ = [
    "BOX",
    "NeedsMathematics",
    "after_hashes",
    "boxed_answer",
    "canonical",
    "cleaned",
    "exact_value",
    "last_box",
    "same",
    "undecided",
]
