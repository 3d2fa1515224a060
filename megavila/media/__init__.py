"""Video files: what they hold, which of their frames to look at, and those frames as pixels."""

from megavila.media.decoder import DecodedFrames, VideoDecoder, get_decoder
from megavila.media.errors import MediaError
from megavila.media.fingerprint import fingerprint
from megavila.media.index import VideoIndex, probe
from megavila.media.loading import FrameCache, load_frames
from megavila.media.sampling import MAX_FRAMES, SampledVideo, sample_video

__all__ = [
    "MAX_FRAMES",
    "DecodedFrames",
    "FrameCache",
    "MediaError",
    "SampledVideo",
    "VideoDecoder",
    "VideoIndex",
    "fingerprint",
    "get_decoder",
    "load_frames",
    "probe",
    "sample_video",
]
