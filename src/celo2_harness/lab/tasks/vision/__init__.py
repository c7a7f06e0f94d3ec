"""Tasks on images: classifiers and autoencoders with their data."""

from celo2_harness.lab.tasks.vision.data import ImageArrays as ImageArrays
from celo2_harness.lab.tasks.vision.data import ImageBatch as ImageBatch
from celo2_harness.lab.tasks.vision.data import ImageData as ImageData
from celo2_harness.lab.tasks.vision.data import ImageFormat as ImageFormat
from celo2_harness.lab.tasks.vision.folders import ImageFolder as ImageFolder
from celo2_harness.lab.tasks.vision.formats import FORMATS as FORMATS
from celo2_harness.lab.tasks.vision.sources import load_images as load_images
from celo2_harness.lab.tasks.vision.task import ImageModel as ImageModel
from celo2_harness.lab.tasks.vision.task import ImageTask as ImageTask
from celo2_harness.lab.tasks.vision.task import make_image_task as make_image_task
