"""How good a one-step student is: one metric a file, the protocol that applies them, the report that tells.

    fid.py                features of two sets of pictures -> Frechet distance
    precision_recall.py   features of two sets of pictures -> how much of each lies within the other
    kid.py                the same -> Kernel Inception Distance
    inception.py          pictures -> the features that these are defined on
    clip.py               pictures and captions -> CLIP score
    accuracy.py           captions and what a judge sees -> share of right attributes
    diversity.py          many pictures of one caption -> their variety, as a share of the truth's
    stickers.py           the protocol on the built-in world: captions, seeds, reference
    candidates.py         `sbrush eval` on it
    coco.py               the protocols on COCO-30K: captions, reference, crop, resizing
    ahead.py              pictures made ready on other threads while the networks are busy
    benchmark.py          `sbrush eval --coco-30k` under one of them
    bench.py              its speed, against the usual way and the floor
    shards.py             what was seen so far, on disk
    published.py          its report, and what papers report
    memory.py             figures that were measured before
    report.py             figures -> table, JSON, HTML

A metric knows neither models nor files: tensors go in, numbers come out.
"""
