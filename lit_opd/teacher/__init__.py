"""The frozen teacher that scores sampled tokens."""

from lit_opd.teacher.base import Teacher
from lit_opd.teacher.local import LocalTeacher

__all__ = ["LocalTeacher", "Teacher"]
