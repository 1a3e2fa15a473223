"""`bce3s reproduce TABLE`: published tables trained again, row by row and seed by seed, with the published figures beside ours.

grid: what a table is made of. sources: whose the published figures are. ablation, cifar_main, methods, beyond: the tables. tables: their
names. shards: the data they need.
runs: which runs that takes, and which are there. train: one run, here or beside others. figures: what finished runs say. statistics and
claims: what follows from it. page: the markdown. command: all of it in order.
"""
