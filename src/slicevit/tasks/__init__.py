"""Tasks beyond classification, on an `ElasticModel` backbone."""
