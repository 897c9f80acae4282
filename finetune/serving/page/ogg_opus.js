// Ogg pages around Opus packets (RFC 3533, RFC 7845), in both directions. Granule positions count samples at 48 kHz
// whatever the sampling rate of the recording.

const HEADER_BYTES = 27;
const FLAG_CONTINUED = 1;
const FLAG_FIRST_PAGE = 2;
const CRC_TABLE = makeCrcTable();

function makeCrcTable() {
  return Uint32Array.from({ length: 256 }, (_, byte) => {
    let value = byte << 24;
    for (let bit = 0; bit < 8; bit++) value = value & 0x80000000 ? (value << 1) ^ 0x04c11db7 : value << 1;
    return value >>> 0;
  });
}

/** The checksum of a page whose own checksum field (bytes 22 to 25) counts as zero. */
function pageChecksum(page) {
  let crc = 0;
  for (let i = 0; i < page.length; i++) {
    const byte = i >= 22 && i < 26 ? 0 : page[i];
    crc = ((crc << 8) ^ CRC_TABLE[((crc >>> 24) ^ byte) & 0xff]) >>> 0;
  }
  return crc;
}

export function concatBytes(...parts) {
  const joined = new Uint8Array(parts.reduce((total, part) => total + part.length, 0));
  let offset = 0;
  for (const part of parts) {
    joined.set(part, offset);
    offset += part.length;
  }
  return joined;
}

function startsWith(bytes, text) {
  return bytes.length >= text.length && [...text].every((letter, i) => bytes[i] === letter.charCodeAt(0));
}

function frameSamples(config) {
  if (config < 12) return [480, 960, 1920, 2880][config % 4];
  if (config < 16) return [480, 960][config % 2];
  return [120, 240, 480, 960][config % 4];
}

/** Duration of an Opus packet in samples at 48 kHz, from its first bytes (RFC 6716, section 3.1). */
export function packetSamples(packet) {
  if (packet.length === 0) return 0;
  const code = packet[0] & 3;
  const frames = code === 0 ? 1 : code < 3 ? 2 : packet[1] & 63;
  return frames * frameSamples(packet[0] >> 3);
}

function opusHead(preSkip, inputSampleRate) {
  const head = new Uint8Array(19);
  head.set(new TextEncoder().encode("OpusHead"));
  const view = new DataView(head.buffer);
  view.setUint8(8, 1); // version
  view.setUint8(9, 1); // channels
  view.setUint16(10, preSkip, true);
  view.setUint32(12, inputSampleRate, true); // gain and mapping family stay 0
  return head;
}

function opusTags(vendor) {
  const name = new TextEncoder().encode(vendor);
  const tags = new Uint8Array(8 + 4 + name.length + 4); // the last four bytes say: no comments
  tags.set(new TextEncoder().encode("OpusTags"));
  new DataView(tags.buffer).setUint32(8, name.length, true);
  tags.set(name, 12);
  return tags;
}

/** A packet's lacing values: 255 for each full segment and a smaller one (0 too) that ends the packet. */
function lacingValues(length) {
  return [...new Array(Math.floor(length / 255)).fill(255), length % 255];
}

/** Makes one mono Ogg-Opus stream. */
export class OggOpusWriter {
  constructor({ serial = randomSerial(), preSkip = 312, inputSampleRate = 24000, vendor = "moshi-ttt" } = {}) {
    this.serial = serial;
    this.preSkip = preSkip;
    this.inputSampleRate = inputSampleRate;
    this.vendor = vendor;
    this.sequence = 0;
    this.granule = 0;
  }

  /** The two pages that must precede all others; each holds one packet alone, as the standard demands. */
  headerPages() {
    const head = this.#page([opusHead(this.preSkip, this.inputSampleRate)], FLAG_FIRST_PAGE);
    return concatBytes(head, this.#page([opusTags(this.vendor)], 0));
  }

  /** One page with these packets; few packets in a page keep the latency low. */
  audioPage(packets) {
    for (const packet of packets) this.granule += packetSamples(packet);
    return this.#page(packets, 0);
  }

  #page(packets, flags) {
    const lacing = packets.flatMap((packet) => lacingValues(packet.length));
    if (lacing.length > 255) throw new RangeError("these packets do not fit into one Ogg page");
    const header = new Uint8Array(HEADER_BYTES + lacing.length);
    const view = new DataView(header.buffer);
    header.set(new TextEncoder().encode("OggS"));
    view.setUint8(5, flags);
    view.setBigUint64(6, BigInt(this.granule), true);
    view.setUint32(14, this.serial, true);
    view.setUint32(18, this.sequence++, true);
    view.setUint8(26, lacing.length);
    header.set(lacing, HEADER_BYTES);
    const page = concatBytes(header, ...packets);
    new DataView(page.buffer).setUint32(22, pageChecksum(page), true);
    return page;
  }
}

function randomSerial() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

/** Index of "OggS", or of what may become one with the bytes to come, from `start` on; else the end. */
function findCapture(bytes, start) {
  for (let i = start; i < bytes.length; i++) {
    if (startsWith(bytes.subarray(i, i + 4), "OggS".slice(0, bytes.length - i))) return i;
  }
  return bytes.length;
}

/**
 * Takes an Ogg-Opus stream in pieces of any size. `head` is the stream's OpusHead packet once it has come.
 * Bytes that are no intact page are skipped up to the next page.
 */
export class OggOpusReader {
  head = null;
  skippedBytes = 0;
  #pending = new Uint8Array(0);
  #partial = null; // the start of a packet that goes on in the next page
  #serial = null;
  #nextSequence = 0;

  /** Returns the audio packets that these bytes complete. */
  push(bytes) {
    const data = concatBytes(this.#pending, bytes);
    const packets = [];
    let offset = 0;
    for (;;) {
      const start = findCapture(data, offset);
      this.skippedBytes += start - offset;
      offset = start;
      const length = pageLength(data.subarray(start));
      if (length === null) break;
      const page = data.subarray(start, start + length);
      if (isIntact(page)) {
        packets.push(...this.#packetsOf(page));
        offset += length;
      } else {
        this.skippedBytes += 1; // this "OggS" opened no page, but one may begin inside it
        offset += 1;
      }
    }
    this.#pending = data.slice(offset);
    return packets;
  }

  #packetsOf(page) {
    const view = new DataView(page.buffer, page.byteOffset, page.length);
    this.#followSequence(view, page[5]);
    const segments = page[26];
    const packets = [];
    let offset = HEADER_BYTES + segments;
    let parts = this.#partial ? [this.#partial] : [];
    // Without its beginning a continued packet is of no use.
    let isOrphan = Boolean(page[5] & FLAG_CONTINUED) && !this.#partial;
    for (const size of page.subarray(HEADER_BYTES, HEADER_BYTES + segments)) {
      parts.push(page.subarray(offset, offset + size));
      offset += size;
      if (size === 255) continue;
      if (!isOrphan) packets.push(concatBytes(...parts));
      parts = [];
      isOrphan = false;
    }
    this.#partial = parts.length && !isOrphan ? concatBytes(...parts) : null;
    return packets.filter((packet) => this.#isAudio(packet));
  }

  /** Forgets a half-received packet where a page is missing or another stream begins. */
  #followSequence(view, flags) {
    const serial = view.getUint32(14, true);
    const sequence = view.getUint32(18, true);
    const goesOn = serial === this.#serial && sequence === this.#nextSequence && flags & FLAG_CONTINUED;
    if (!goesOn) this.#partial = null;
    this.#serial = serial;
    this.#nextSequence = (sequence + 1) >>> 0;
  }

  #isAudio(packet) {
    if (startsWith(packet, "OpusHead")) {
      this.head = packet;
      return false;
    }
    return packet.length > 0 && !startsWith(packet, "OpusTags");
  }
}

/** Length of the page at the start of `bytes`, null as long as too little of it has come. */
function pageLength(bytes) {
  if (bytes.length < HEADER_BYTES) return null;
  const segments = bytes[26];
  if (bytes.length < HEADER_BYTES + segments) return null;
  const body = bytes.subarray(HEADER_BYTES, HEADER_BYTES + segments).reduce((total, size) => total + size, 0);
  const length = HEADER_BYTES + segments + body;
  return bytes.length < length ? null : length;
}

function isIntact(page) {
  const view = new DataView(page.buffer, page.byteOffset, page.length);
  return page[4] === 0 && view.getUint32(22, true) === pageChecksum(page);
}
