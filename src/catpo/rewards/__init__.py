"""Token rewards on disk: the store of raw signals, their fusion into weights (Eq. 6-7), their quality.

May import: core, text, files, runtime, data. No torch.
Exports: `RewardStore` (store), `Fusion` (fusion_options), `fuse` (fusion), `signal_quality` (quality).
"""
