"""Rewards of responses: form, accuracy, and the user's own functions."""

from megavila.rewards.accuracy import accuracy
from megavila.rewards.form import extract_answer, has_form
from megavila.rewards.plugins import RewardFunction, load_function
from megavila.rewards.scorer import Score, Scorer

__all__ = ["RewardFunction", "Score", "Scorer", "accuracy", "extract_answer", "has_form", "load_function"]
