"""ReMoRA: when matrices are merged, how, and the ledger that records it."""
