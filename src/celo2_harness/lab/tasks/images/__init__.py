"""Small image sets for meta-training: 8x8 grey images with labels 0 to 9, from several kinds of sources."""

from celo2_harness.lab.tasks.images.loading import SOURCES as SOURCES
from celo2_harness.lab.tasks.images.loading import Source as Source
from celo2_harness.lab.tasks.images.loading import find_sets as find_sets
from celo2_harness.lab.tasks.images.loading import load_image_sets as load_image_sets
from celo2_harness.lab.tasks.images.pairs import CLASSES as CLASSES
from celo2_harness.lab.tasks.images.pairs import SIDE as SIDE
from celo2_harness.lab.tasks.images.pairs import DataError as DataError
from celo2_harness.lab.tasks.images.pairs import Pair as Pair
from celo2_harness.lab.tasks.images.pairs import shrink as shrink
from celo2_harness.lab.tasks.images.prepare import prepare_image_sets as prepare_image_sets
from celo2_harness.lab.tasks.images.sets import ImageSets as ImageSets
