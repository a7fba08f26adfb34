export const SIZE = {
  '14B: 1280 × 720': { width: 1280, height: 720 },
  '14B: 720 × 1280': { width: 720, height: 1280 },
  '14B, 1.3B: 832 × 480': { width: 832, height: 480 },
  '14B, 1.3B: 480 × 832': { width: 480, height: 832 },
  '5B: 1280 × 704': { width: 1280, height: 704 },
  '5B: 704 × 1280': { width: 704, height: 1280 },
  'T2I-14B: 1024 × 1024': { width: 1024, height: 1024 }
}

export const LENGTH = {
  '14B, 1.3B: 5 s (81 frames at 16 fps)': { frames: 81 },
  '14B, 1.3B: 3 s (49 frames at 16 fps)': { frames: 49 },
  '5B: 5 s (121 frames at 24 fps)': { frames: 121 },
  '5B: 3 s (73 frames at 24 fps)': { frames: 73 },
  'One picture (1 frame)': { frames: 1 }
}
