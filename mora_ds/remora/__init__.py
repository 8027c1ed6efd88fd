"""ReMoRA: how MoRA matrices are merged into the base, and the merge ledger that records
it.

merge             `ReMoRA`: merges of one engine, and its base rebuilt at a resume
ledger            `Ledger`: every merged matrix of a run, on disk
stored_weights    the tensors of the base's files that a layer's updates belong to
"""
