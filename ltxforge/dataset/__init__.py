"""From folders of captioned clips to batches."""
