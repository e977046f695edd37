"""Evaluation: bits per byte of text, accuracy on minimal pairs and facts, models side by side, and text from a prompt."""

from hyperllama.evaluate.facts import evaluate_facts
from hyperllama.evaluate.folder import Measured, evaluate_folder, folder_start, load_folder, measure_folder
from hyperllama.evaluate.generate import generate
from hyperllama.evaluate.pairs import evaluate_pairs
from hyperllama.evaluate.text import evaluate_text

__all__ = [
    "Measured",
    "evaluate_facts",
    "evaluate_folder",
    "evaluate_pairs",
    "evaluate_text",
    "folder_start",
    "generate",
    "load_folder",
    "measure_folder",
]
