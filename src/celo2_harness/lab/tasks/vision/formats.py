"""The formats of the usual image sets, by name: what sizes of image tasks are called."""

from celo2_harness.lab.tasks.vision.data import ImageFormat

FORMATS = {
    # Means and deviations are those of the training images, rounded; those of ImageNet are the customary ones.
    "digits": ImageFormat(8, 8, 1, classes=10, mean=(0.3052,), deviation=(0.3749,)),
    "fashion": ImageFormat(28, 28, 1, classes=10, mean=(0.2860,), deviation=(0.3530,)),
    "cifar": ImageFormat(32, 32, 3, 10, mean=(0.4914, 0.4822, 0.4465), deviation=(0.2470, 0.2435, 0.2616)),
    "imagenet": ImageFormat(224, 224, 3, 1000, mean=(0.485, 0.456, 0.406), deviation=(0.229, 0.224, 0.225)),
}
