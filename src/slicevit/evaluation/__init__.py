"""Measuring: accuracy, latency, statistics, and the tables, pictures and pages made from them.

Nothing here knows how a width is made: evaluators are handed one named predictor per width.
"""
