"""Tests of stvit."""
