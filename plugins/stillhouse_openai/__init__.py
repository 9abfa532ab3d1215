"""A teacher on a server: top-k log-probabilities of given tokens from an OpenAI-compatible one, such as vLLM."""

from stillhouse_openai.client import ServerError
from stillhouse_openai.teacher import OpenAITeacher, openai

__all__ = ["OpenAITeacher", "ServerError", "openai"]
