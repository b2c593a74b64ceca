"""How one function of upstream is wrapped, and how a module says that it wants that. Knows nothing of attention.

Functions are replaced where upstream looks them up (on a class, in the namespace of a modeling file, in a mapping), by
plain functions that call straight through unless the call concerns a patched model. Plain functions rather than wrapt's
proxies, because others take a forward apart: accelerate calls `model.forward.__func__`, which on a proxy is the
original.
"""
