"""The frozen teacher that scores sampled tokens."""

from lit_opd.teacher.aligned import AlignedTeacher
from lit_opd.teacher.base import Teacher
from lit_opd.teacher.base_model import BaseModelTeacher
from lit_opd.teacher.cached import CachedTeacher
from lit_opd.teacher.local import LocalTeacher
from lit_opd.teacher.mixed import MixedTeacher
from lit_opd.teacher.remote import RemoteTeacher
from lit_opd.teacher.routed import RoutedTeacher
from lit_opd.teacher.self_teacher import SelfTeacher

__all__ = [
    "AlignedTeacher",
    "BaseModelTeacher",
    "CachedTeacher",
    "LocalTeacher",
    "MixedTeacher",
    "RemoteTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "Teacher",
]
