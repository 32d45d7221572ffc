package frontend

import (
	"encoding/binary"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// How long Linux waits for replies (drivers/char/tpm/tpm2-cmd.c, TPM2_DURATION_MEDIUM and LONG; the PC Client Platform TPM
// Profile has them for commands of such durations), and how long before that a guest is held still: it does not stand still at
// once, and a pause for a reply that is only slow costs more of that time than it saves.
const (
	mediumDuration = 750 * time.Millisecond
	longDuration   = 2 * time.Second
	ahead          = 200 * time.Millisecond
)

// patience is how long a command's reply may take before a guest whose driver polls for it is held still, by what Linux waits for
// (tpm2_ordinal_duration_index in the same file). The other commands are not bounded: it waits minutes for them, they make and use
// keys, and a guest goes on meanwhile.
func patience(command []byte) (d time.Duration, bounded bool) {
	if len(command) < 10 { // Part 1 §18.2: tag, size, code
		return 0, false
	}
	switch tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) {
	case tpm2.TPMCCStartup, tpm2.TPMCCGetCapability, tpm2.TPMCCPCRExtend,
		tpm2.TPMCCHashSequenceStart, tpm2.TPMCCSequenceUpdate, tpm2.TPMCCSequenceComplete, tpm2.TPMCCEventSequenceComplete:
		return mediumDuration - ahead, true
	case tpm2.TPMCCSelfTest, tpm2.TPMCCGetRandom, tpm2.TPMCCNVRead, tpm2.TPMCCHierarchyControl, tpm2.TPMCCHierarchyChanegAuth:
		return longDuration - ahead, true
	}
	return 0, false
}
