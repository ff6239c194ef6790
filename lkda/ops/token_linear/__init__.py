"""Linear layers of a few tokens, as in decoding: one launch with the norm before a layer and what follows it."""
