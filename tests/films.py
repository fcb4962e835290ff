"Videos with sound, made as a test needs them."
import av
import numpy as np


def sounding(path, tone=None, offset=0., format=None, channels=1, seconds=3., tracks=None, first=0):
    "A video with tones; `tracks`: samples (channels, n) of each sound track; `offset` in s puts them after the picture."
    sr = 48_000
    wave = (.5*np.sin(2*np.pi*440*np.arange(int(seconds*sr))/sr)).astype(np.float32)
    tracks = tracks or [np.tile(wave, (channels, 1))]
    with av.open(str(path), 'w', format=format) as out:
        video = out.add_stream('libx264', rate=10, width=96, height=64, pix_fmt='yuv420p', options=dict(preset='ultrafast'))
        layouts = {1: 'mono', 2: 'stereo', 6: '5.1'}
        sounds = [out.add_stream('aac', rate=sr, layout=layouts[len(t)]) for t in tracks]
        for i in range(int(10*seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), (first + 8*i) % 250, np.uint8), format='rgb24')
            frame.pts = i + (round(-10*offset) if offset < 0 else 0)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for stream, samples in zip(sounds, tracks):
            for at in range(0, samples.shape[1] - 1023, 1024):
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, at:at+1024]), format='fltp', layout=layouts[len(samples)])
                frame.sample_rate, frame.pts = sr, at + (round(offset*sr) if offset > 0 else 0)
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return path
