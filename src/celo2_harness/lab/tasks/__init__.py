"""What is trained: models with their data. Tasks know nothing of optimizers."""

from celo2_harness.lab.tasks.gpt import (
    GPT as GPT,
    MODELS as MODELS,
    TOKEN_MODELS as TOKEN_MODELS,
    GPTConfig as GPTConfig,
    gpt_loss as gpt_loss,
    init_gpt as init_gpt,
)
from celo2_harness.lab.tasks.image_files import DataError as DataError
from celo2_harness.lab.tasks.image_sets import (
    ImageSets as ImageSets,
    find_sets as find_sets,
    load_image_sets as load_image_sets,
    prepare_image_sets as prepare_image_sets,
    shrink as shrink,
)
from celo2_harness.lab.tasks.image_task import ImageTask as ImageTask, make_image_task as make_image_task
from celo2_harness.lab.tasks.images import (
    FORMATS as FORMATS,
    ImageArrays as ImageArrays,
    ImageFormat as ImageFormat,
    load_images as load_images,
)
from celo2_harness.lab.tasks.kinds import (
    TASKS as TASKS,
    TaskKind as TaskKind,
    find_task as find_task,
    make_task as make_task,
)
from celo2_harness.lab.tasks.language_model import (
    LanguageData as LanguageData,
    LanguageModel as LanguageModel,
    make_language_model as make_language_model,
    make_token_language_model as make_token_language_model,
)
from celo2_harness.lab.tasks.task import Task as Task, step_generator as step_generator
from celo2_harness.lab.tasks.text import (
    Text as Text,
    byte_classes as byte_classes,
    default_text as default_text,
    read_text as read_text,
    split_text as split_text,
)
from celo2_harness.lab.tasks.tokenizing import write_tokens as write_tokens
from celo2_harness.lab.tasks.tokens import TokenShards as TokenShards, open_tokens as open_tokens
