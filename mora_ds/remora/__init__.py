"""ReMoRA: when MoRA matrices are merged into the base, how, and the merge ledger that
records it.

schedule          the learning rate of every step, and the steps at which a merge may come
merge             `ReMoRA`: merges and replays for one engine
ledger            `Ledger`: every merged matrix of a run, on disk
"""
