"""The published classes with only the import path changed: same constructor, return values and
``state_dict``; one module a package.

Every class with an operator in it takes one more argument, ``backend=`` ("native", "triton",
"reference" or None). No published package is imported.
"""
