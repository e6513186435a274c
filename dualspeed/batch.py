"""Conventions of a training batch that data, method and training share."""

IGNORE_INDEX = -100
"""Label of a token without supervision, as in torch's cross-entropy."""
QUESTION_PADDING = -1
"""Padding of `question_ids`, (B, Q), behind shorter questions."""
TOWER_STATES = "tower_states"
"""Input with kept outputs of a frozen vision tower, one an image; in a batch without images it is there, and empty."""
INPUTS_PER_IMAGE = ("image_sizes", "image_grid_thw", TOWER_STATES)
"""Model inputs with one row an image; `pixel_values` has one too, or one a patch or a sample."""
TOKEN_INPUTS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Model inputs with one number a token, (B, L), which are padded with 0 and pruned along with the tokens."""
