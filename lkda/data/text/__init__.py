"""Text from files, from the Hugging Face hub or from token files: tokenized, cached and packed into batches."""
