"""kazuto1011/deeplab-pytorch, libs.models: one module a published file (``deeplabv2``,
``deeplabv3``).
"""
