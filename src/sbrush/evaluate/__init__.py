"""How good a one-step student is: one metric a file, the protocol that applies them, the report that tells.

    fid.py                features of two sets of pictures -> Frechet distance
    precision_recall.py   features of two sets of pictures -> how much of each lies within the other
    accuracy.py           captions and what a judge sees -> share of right attributes
    diversity.py          many pictures of one caption -> their variety, as a share of the truth's
    stickers.py           the protocol on the built-in world: captions, seeds, reference
    memory.py             figures that were measured before
    report.py             figures -> table, JSON, HTML

A metric knows neither models nor files: tensors go in, numbers come out.
"""
