"""Choices within a budget against the best choice by hand, and against a fixed adapter."""
