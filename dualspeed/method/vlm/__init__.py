"""Everything that depends on the family of a VLM."""
