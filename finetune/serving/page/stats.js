// Counters of the latest conversation, for tests and for a look from the browser's console.

export const stats = (window.conversationStats = {});

export function resetStats() {
  Object.assign(stats, {
    state: "idle",
    microphoneBlocks: 0,
    packetsSent: 0,
    packetsReceived: 0,
    secondsDecoded: 0,
    secondsScheduled: 0,
    secondsPlayed: 0,
    loudestPlayed: 0,
    underruns: 0,
    packetsLeftOut: 0,
    bytesSkipped: 0,
    textPieces: 0,
    metadataMessages: 0,
    closeCode: null,
  });
}
