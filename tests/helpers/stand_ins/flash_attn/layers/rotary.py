"""A name that transformers 4.51 to 4.53 import."""


def apply_rotary_emb(*args, **kwargs):
    raise NotImplementedError("the stand-in has no rotary kernel")
