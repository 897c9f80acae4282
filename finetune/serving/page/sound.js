// Functions on sound that the microphone and the voice share.

export function rootMeanSquare(samples) {
  return Math.sqrt(samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length);
}

/** Browsers may create a context asleep. It is not waited for: closing a context rejects this. */
export function keepRunning(context) {
  context.resume().catch(() => {});
}
