"""Model packages out of what training leaves: looked through, built, certified, and validated.

- source.py: what kind of source a folder or video is, and where its parts are
- pictures.py, landmarks.py, crops.py: its frames, their crop rectangles, and crops as training cuts them
- frames.py, sound.py, rectangles.py: looked at, and what is missing made good
- preflight.py, findings.py, plan.py: all of that, into a report and a plan
- draft.py, videos.py, weights.py, manifest.py: what is written, and where it is kept until it is whole
- build.py: from the source to the finished package
- certificate.py: frames of the finished package against the training recipe's own
- validate.py: every check of a package
"""
