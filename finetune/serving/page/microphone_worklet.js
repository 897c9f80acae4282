// Runs on the audio thread: collects the microphone's samples into blocks of one Opus frame and posts them.

class MicrophoneBlocks extends AudioWorkletProcessor {
  constructor({ processorOptions }) {
    super();
    this.block = new Float32Array(processorOptions.blockSize);
    this.filled = 0;
  }

  process([input], [output]) {
    // Without a running source there are no channels; silence keeps the model's clock going.
    const samples = input[0] ?? new Float32Array(output[0].length);
    let offset = 0;
    while (offset < samples.length) {
      const count = Math.min(samples.length - offset, this.block.length - this.filled);
      this.block.set(samples.subarray(offset, offset + count), this.filled);
      this.filled += count;
      offset += count;
      if (this.filled === this.block.length) this.postBlock();
    }
    return true;
  }

  postBlock() {
    this.port.postMessage(this.block, [this.block.buffer]);
    this.block = new Float32Array(this.filled);
    this.filled = 0;
  }
}

registerProcessor("microphone-blocks", MicrophoneBlocks);
