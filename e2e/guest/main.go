// Command guest runs inside a test guest and uses its TPM as a guest would.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
)

const secret = "opened only by the boot it was sealed to"

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Println("GUEST FAILED", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 3 && args[0] == "io" {
		return load(args[1], args[2])
	}
	if len(args) == 1 && args[0] == "talk" {
		return talk()
	}
	if len(args) == 2 && args[0] == "sink" {
		return sink(args[1])
	}
	if len(args) >= 2 && args[0] == "verify" {
		rounds := 0
		if len(args) == 3 {
			var err error
			if rounds, err = strconv.Atoi(args[2]); err != nil {
				return err
			}
		}
		return verify(args[1], rounds)
	}
	tpm, err := linuxtpm.Open("/dev/tpmrm0")
	if err != nil {
		return err
	}
	defer tpm.Close()
	switch {
	case len(args) == 2 && args[0] == "seal":
		return seal(tpm, args[1])
	case len(args) == 2 && args[0] == "unseal":
		return unseal(tpm, args[1])
	case len(args) == 1 && args[0] == "clear":
		return clearTPM(tpm)
	}
	return errors.New("usage: guest seal|unseal DISK, guest clear, guest io WORKLOAD DISK, guest verify DISK [ROUNDS], guest sink DISK, guest talk")
}

// pcrs are those the Builder measures what it boots into.
var pcrs = tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
	{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(0, 1, 4, 8, 9)},
}}

func primary(tpm transport.TPM) (*tpm2.CreatePrimaryResponse, error) {
	return tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner,
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(tpm)
}

func policy(tpm transport.TPM, h tpm2.TPMISHPolicy, _ tpm2.TPM2BNonce) error {
	_, err := tpm2.PolicyPCR{PolicySession: h, Pcrs: pcrs}.Execute(tpm)
	return err
}

func seal(tpm transport.TPM, disk string) error {
	p, err := primary(tpm)
	if err != nil {
		return err
	}
	session, done, err := tpm2.PolicySession(tpm, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
	if err != nil {
		return err
	}
	if err := policy(tpm, session.Handle(), tpm2.TPM2BNonce{}); err != nil {
		return err
	}
	digest, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(tpm)
	if err != nil {
		return err
	}
	if err := done(); err != nil {
		return err
	}
	made, err := tpm2.Create{
		ParentHandle: tpm2.AuthHandle{Handle: p.ObjectHandle, Name: p.Name, Auth: tpm2.PasswordAuth(nil)},
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte(secret)}),
		}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{
			Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, AuthPolicy: digest.PolicyDigest,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true},
		}),
	}.Execute(tpm)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	for _, b := range [][]byte{tpm2.Marshal(made.OutPublic), tpm2.Marshal(made.OutPrivate)} {
		_ = binary.Write(&out, binary.LittleEndian, uint32(len(b))) // to memory
		out.Write(b)
	}
	f, err := os.OpenFile(disk, os.O_WRONLY|os.O_SYNC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(append(out.Bytes(), make([]byte, 4096-out.Len())...)); err != nil {
		return err
	}
	fmt.Println("SEALED")
	return nil
}

func unseal(tpm transport.TPM, disk string) error {
	raw, err := os.Open(disk)
	if err != nil {
		return err
	}
	defer raw.Close()
	buf := make([]byte, 4096)
	if _, err := raw.Read(buf); err != nil {
		return err
	}
	var parts [2][]byte
	for i := range parts {
		n := binary.LittleEndian.Uint32(buf)
		if n > 1024 {
			return fmt.Errorf("nothing sealed on %s", disk)
		}
		parts[i], buf = buf[4:4+n], buf[4+n:]
	}
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](parts[0])
	if err != nil {
		return err
	}
	private, err := tpm2.Unmarshal[tpm2.TPM2BPrivate](parts[1])
	if err != nil {
		return err
	}
	p, err := primary(tpm)
	if err != nil {
		return err
	}
	item, err := tpm2.Load{
		ParentHandle: tpm2.AuthHandle{Handle: p.ObjectHandle, Name: p.Name, Auth: tpm2.PasswordAuth(nil)},
		InPublic:     *public, InPrivate: *private,
	}.Execute(tpm)
	if err != nil {
		return err
	}
	opened, err := tpm2.Unseal{ItemHandle: tpm2.AuthHandle{
		Handle: item.ObjectHandle, Name: item.Name, Auth: tpm2.Policy(tpm2.TPMAlgSHA256, 16, policy),
	}}.Execute(tpm)
	if err != nil {
		fmt.Println("STAYS CLOSED", err)
		return nil
	}
	fmt.Println("OPENED", string(opened.OutData.Buffer))
	return nil
}

// clearTPM does what a guest's root may: take the lockout hierarchy and clear the TPM.
func clearTPM(tpm transport.TPM) error {
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(tpm); err != nil {
		return err
	}
	fmt.Println("CLEARED")
	return nil
}
