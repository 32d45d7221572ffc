package frontend

import (
	"encoding/binary"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// shortWait is half of the shortest time for which Linux waits for a reply, 750 ms (drivers/char/tpm/tpm2-cmd.c,
// TPM2_DURATION_MEDIUM; the PC Client Platform TPM Profile has it for commands of medium duration): on a busy host a guest does
// not stop at once, and a pause for a reply that is only slow costs more of that time than it saves.
const shortWait = 375 * time.Millisecond

// patience is how long a command's reply may take before a guest's driver that polls for it is held still: for those that
// Linux waits 0.75 or 2 s for (tpm2_ordinal_duration_index in the same file), shortWait; none for the others, which it waits minutes
// for: they make and use keys, and a guest goes on meanwhile.
func patience(command []byte) (d time.Duration, bounded bool) {
	if len(command) < 10 { // Part 1 §18.2: tag, size, code
		return 0, false
	}
	switch tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) {
	case tpm2.TPMCCStartup, tpm2.TPMCCSelfTest, tpm2.TPMCCGetRandom, tpm2.TPMCCGetCapability, tpm2.TPMCCPCRExtend, tpm2.TPMCCNVRead,
		tpm2.TPMCCHashSequenceStart, tpm2.TPMCCSequenceUpdate, tpm2.TPMCCSequenceComplete, tpm2.TPMCCEventSequenceComplete,
		tpm2.TPMCCHierarchyControl, tpm2.TPMCCHierarchyChanegAuth:
		return shortWait, true
	}
	return 0, false
}
