"""What is trained: models with their data. Tasks know nothing of optimizers."""

from celo2_harness.tasks.gpt import GPT as GPT
from celo2_harness.tasks.gpt import MODELS as MODELS
from celo2_harness.tasks.gpt import GPTConfig as GPTConfig
from celo2_harness.tasks.gpt import gpt_loss as gpt_loss
from celo2_harness.tasks.gpt import init_gpt as init_gpt
from celo2_harness.tasks.kinds import TASKS as TASKS
from celo2_harness.tasks.kinds import TaskKind as TaskKind
from celo2_harness.tasks.kinds import make_task as make_task
from celo2_harness.tasks.language_model import LanguageModel as LanguageModel
from celo2_harness.tasks.language_model import make_language_model as make_language_model
from celo2_harness.tasks.task import Task as Task
from celo2_harness.tasks.text import Text as Text
from celo2_harness.tasks.text import default_text as default_text
from celo2_harness.tasks.text import read_text as read_text
from celo2_harness.tasks.text import sample_windows as sample_windows
from celo2_harness.tasks.text import split_text as split_text
from celo2_harness.tasks.text import spread_windows as spread_windows
from celo2_harness.tasks.vision import ImageFormat as ImageFormat
from celo2_harness.tasks.vision import ImageTask as ImageTask
from celo2_harness.tasks.vision import load_images as load_images
from celo2_harness.tasks.vision import make_image_task as make_image_task
