"""Products with weights: one TP8 and EP8 rank's shapes of MiniMax-M3, checked, timed and tuned."""
