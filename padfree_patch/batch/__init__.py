"""Where the examples of a batch end: the boundary type, and every way in which a batch can say it.

Imports nothing that patches models; data sets, collators and patched models all read batches here.
"""
