package eventlog

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/google/go-tpm/tpm2"
)

// Digest is the event's digest of a bank, or nil.
func (e Event) Digest(bank tpm2.TPMAlgID) []byte {
	for _, d := range e.Digests {
		if d.Algorithm == bank {
			return d.Sum
		}
	}
	return nil
}

// Measured is the part of the data that the digests are made of, where the event is of a kind
// whose digest is made of its data; ok says whether the digests bear that out. Nothing else of
// the data is covered by a quote: text of an event with ok false proves nothing.
func (e Event) Measured() (content []byte, ok bool) {
	content = e.Data
	if e.Type == TypeIPL {
		content = bytes.TrimPrefix(e.Data, []byte(CmdlinePrefix))
	}
	for _, d := range e.Digests {
		h := hashes[d.Algorithm]
		if h.new == nil {
			continue
		}
		sum := h.new()
		sum.Write(content)
		if !bytes.Equal(sum.Sum(nil), d.Sum) {
			return nil, false
		}
		ok = true
	}
	return content, ok
}

// maxText bounds what Text returns, in bytes.
const maxText = 4 << 10

// Text is the data as a line a person can read: text where the data is text (UTF-16 too),
// else its first bytes in hexadecimal. It holds no control character, whatever the data.
func (e Event) Text() string {
	d := bytes.TrimRight(e.Data, "\x00")
	if e.Type == TypeSCRTMVersion {
		if s, ok := utf16Text(e.Data); ok {
			return s
		}
	}
	if len(d) > 0 && len(d) <= maxText && utf8.Valid(d) && printable(string(d)) {
		return string(d)
	}
	if len(e.Data) == 0 {
		return ""
	}
	const shown = 32
	if len(e.Data) > shown {
		return fmt.Sprintf("%x… (%d bytes)", e.Data[:shown], len(e.Data))
	}
	return fmt.Sprintf("%x", e.Data)
}

func utf16Text(b []byte) (string, bool) {
	if len(b) == 0 || len(b)%2 != 0 || len(b) > maxText {
		return "", false
	}
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	s := strings.TrimRight(string(utf16.Decode(u)), "\x00")
	return s, s != "" && printable(s) && !strings.ContainsRune(s, utf8.RuneError)
}

func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool {
		// Controls, and the direction marks that could turn a line around.
		return r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200b && r <= 0x200f ||
			r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0xfeff
	})
}

// typeNames are the event types of PFP 1.05 §10.4.1, tables 27 and 28.
var typeNames = map[uint32]string{
	0x00000000: "EV_PREBOOT_CERT",
	0x00000001: "EV_POST_CODE",
	0x00000002: "EV_UNUSED",
	0x00000003: "EV_NO_ACTION",
	0x00000004: "EV_SEPARATOR",
	0x00000005: "EV_ACTION",
	0x00000006: "EV_EVENT_TAG",
	0x00000007: "EV_S_CRTM_CONTENTS",
	0x00000008: "EV_S_CRTM_VERSION",
	0x00000009: "EV_CPU_MICROCODE",
	0x0000000a: "EV_PLATFORM_CONFIG_FLAGS",
	0x0000000b: "EV_TABLE_OF_DEVICES",
	0x0000000c: "EV_COMPACT_HASH",
	0x0000000d: "EV_IPL",
	0x0000000e: "EV_IPL_PARTITION_DATA",
	0x0000000f: "EV_NONHOST_CODE",
	0x00000010: "EV_NONHOST_CONFIG",
	0x00000011: "EV_NONHOST_INFO",
	0x00000012: "EV_OMIT_BOOT_DEVICE_EVENTS",
	0x00000013: "EV_POST_CODE2",
	0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
	0x80000002: "EV_EFI_VARIABLE_BOOT",
	0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
	0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
	0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
	0x80000006: "EV_EFI_GPT_EVENT",
	0x80000007: "EV_EFI_ACTION",
	0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
	0x80000009: "EV_EFI_HANDOFF_TABLES",
	0x8000000a: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
	0x8000000b: "EV_EFI_HANDOFF_TABLES2",
	0x8000000c: "EV_EFI_VARIABLE_BOOT2",
	0x8000000d: "EV_EFI_GPT_EVENT2",
	0x80000010: "EV_EFI_HCRTM_EVENT",
	0x800000e0: "EV_EFI_VARIABLE_AUTHORITY",
	0x800000e1: "EV_EFI_SPDM_FIRMWARE_BLOB",
	0x800000e2: "EV_EFI_SPDM_FIRMWARE_CONFIG",
}

// TypeName is the name of an event type as the specification writes it; its number in
// hexadecimal where it has none.
func TypeName(t uint32) string {
	if s, ok := typeNames[t]; ok {
		return s
	}
	return fmt.Sprintf("%#08x", t)
}
