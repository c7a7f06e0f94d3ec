"""The options that `celo2 train` and `celo2 compare` share."""

from dataclasses import dataclass
from pathlib import Path

from celo2_harness.lab.errors import input_errors
from celo2_harness.lab.tasks import LanguageModel, make_language_model


@dataclass(frozen=True)
class GPTOptions:
    """A GPT on a text, and how it is trained."""

    text: Path | None = None
    """Text file to learn from, of any kind; by default the language reference that comes with Python."""
    model: str = "nano"
    """Size of the model: nano (0.9 million parameters), small (11), gpt2 (86) or gpt3-xl (1213)."""
    batch: int = 16
    """Windows per step."""
    context: int | None = None
    """Window length in bytes; by default the model's."""
    dtype: str = "float32"
    """What the model computes in: float32 or bfloat16."""
    param_dtype: str = "float32"
    """What the parameters are kept in: float32 or bfloat16."""
    schedule: str = "warmup_cosine"
    """Schedule of the learning rate over the run."""
    warmup: float = 0.05
    """Part of the run in which the learning rate rises."""
    weight_decay: float = 0.1
    """Weight decay."""
    weights: str | None = None
    """Weights of the learned rule: a name, a file or hf://owner/repo; by default the preset's."""
    average_tail: bool = False
    """Evaluate the average of the last parameters instead of the parameters themselves."""

    def task(self) -> LanguageModel:
        """Returns the task that the options ask for."""
        formats = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        with input_errors():
            return make_language_model(self.model, self.text, self.batch, context=self.context, **formats)
