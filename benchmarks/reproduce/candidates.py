"""The search's weightings under the class path that stands in its plans, and so in the hashes of all runs that are finished."""

from benchmarks.studies.reproduce.candidates import Largest, SurpriseDrift, TeacherCertainty, WindowedRatio

__all__ = ["Largest", "SurpriseDrift", "TeacherCertainty", "WindowedRatio"]
