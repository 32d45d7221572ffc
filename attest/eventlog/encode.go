package eventlog

import (
	"encoding/binary"
	"fmt"
	"slices"
)

// Encode writes a crypto-agile log: a Spec ID event that declares the algorithms the events
// use, then the events (PFP 1.05 §10.2.2, §10.4.5.1). The same events always give the same
// bytes. It refuses what could not be read back: digests of one algorithm that differ in
// length, two of them in one event, or more than [MaxAlgorithms].
func Encode(events []Event) ([]byte, error) {
	var banks []Bank
	for n, e := range events {
		for i, d := range e.Digests {
			size := sizeIn(banks, d.Algorithm)
			if size == 0 {
				size = len(d.Sum)
				if h, ok := hashes[d.Algorithm]; ok {
					size = h.size
				}
				banks = append(banks, Bank{d.Algorithm, size})
			}
			if len(d.Sum) != size || size == 0 || size > maxDigest {
				return nil, fmt.Errorf("event log: event %d: %s digest has %d bytes, not %d", n+1, AlgorithmName(d.Algorithm), len(d.Sum), size)
			}
			if slices.ContainsFunc(e.Digests[:i], func(o Digest) bool { return o.Algorithm == d.Algorithm }) {
				return nil, fmt.Errorf("event log: event %d: two digests of %s", n+1, AlgorithmName(d.Algorithm))
			}
		}
	}
	if len(banks) > MaxAlgorithms {
		return nil, fmt.Errorf("event log: %d algorithms: the most is %d", len(banks), MaxAlgorithms)
	}
	if len(banks) == 0 { // the header must declare one
		banks = []Bank{{Banks[1], hashes[Banks[1]].size}}
	}
	slices.SortFunc(banks, func(a, b Bank) int { return int(a.Algorithm) - int(b.Algorithm) })

	le := binary.LittleEndian
	spec := append([]byte(nil), signature...)
	spec = le.AppendUint32(spec, 0)   // platform class: client
	spec = append(spec, 0, 2, 105, 2) // PFP family 2.0 (minor, major), 1.05 (errata); UINTN of 64 bits
	spec = le.AppendUint32(spec, u32(len(banks)))
	for _, b := range banks {
		spec = le.AppendUint16(spec, uint16(b.Algorithm))
		spec = le.AppendUint16(spec, uint16(b.Size))
	}
	spec = append(spec, 0) // no vendor data

	var log []byte
	log = le.AppendUint32(log, 0)
	log = le.AppendUint32(log, TypeNoAction)
	log = append(log, make([]byte, 20)...)
	log = le.AppendUint32(log, u32(len(spec)))
	log = append(log, spec...)
	for _, e := range events {
		log = le.AppendUint32(log, e.PCR)
		log = le.AppendUint32(log, e.Type)
		log = le.AppendUint32(log, u32(len(e.Digests)))
		for _, d := range e.Digests {
			log = le.AppendUint16(log, uint16(d.Algorithm))
			log = append(log, d.Sum...)
		}
		log = le.AppendUint32(log, u32(len(e.Data)))
		log = append(log, e.Data...)
	}
	if len(log) > MaxLog {
		return nil, fmt.Errorf("event log: %d bytes: the most is %d", len(log), MaxLog)
	}
	return log, nil
}

func u32(n int) uint32 { return uint32(n) }
