"""Conversations: environments that answer the student between its turns, and the sampler that plays them."""

from lit_opd.turns.environment import Answer, Environment, Episode, Response
from lit_opd.turns.python_tool import PythonTool
from lit_opd.turns.sampler import TurnsSampler
from lit_opd.turns.tools import Calculator, LookUp, Tool, ToolEnvironment, ToolError

__all__ = [
    "Answer",
    "Calculator",
    "Environment",
    "Episode",
    "LookUp",
    "PythonTool",
    "Response",
    "Tool",
    "ToolEnvironment",
    "ToolError",
    "TurnsSampler",
]
