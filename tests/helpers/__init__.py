"""What tests of several files share: models, batches, comparisons, the code of the pages."""
