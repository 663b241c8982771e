"""A disk that fails, or a process that is killed, at a chosen call."""

from __future__ import annotations

import os
import shutil

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename")


class Killed(BaseException):
    """Stands for a process that is gone: none of its later calls is carried out."""


class Disk:
    """Count the calls that change a disk, and fail at one of them; calls that clean up are not counted."""

    def __init__(self, monkeypatch, fail_at=None, error=None):
        self.calls, self.fail_at, self.error, self.deleting = [], fail_at, error, False
        for name in CALLS:
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", self.uncounted(shutil.rmtree))

    @property
    def dead(self):
        return self.error is Killed and self.fail_at is not None and len(self.calls) > self.fail_at

    def counted(self, name, real):
        def call(*arguments, **options):
            if self.deleting:
                return real(*arguments, **options)
            self.calls.append(name)
            failing = len(self.calls) - 1 == self.fail_at
            if name == "close":  # a failing close has closed all the same
                real(*arguments, **options)
            if self.dead:
                raise Killed
            if failing:
                raise OSError(self.error, os.strerror(self.error))
            return None if name == "close" else real(*arguments, **options)

        return call

    def uncounted(self, real):
        def call(*arguments, **options):
            if self.dead:
                return
            self.deleting = True
            real(*arguments, **options)
            self.deleting = False

        return call
