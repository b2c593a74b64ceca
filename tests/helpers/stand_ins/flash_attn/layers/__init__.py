"""transformers 4.51 to 4.53 import a rotary kernel from here, for models that are not under test."""
